#include <iostream>
#include <string>
#include <vector>

#include "driver/progress.h"
#include "driver/session.h"

int main(int argc, char** argv) {
  const std::string program = argc > 0 ? argv[0] : "gptq_toy";
  const std::vector<std::string> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
  return miniquant::driver::run_session(program, arguments, std::cout, std::cerr,
                                        miniquant::driver::error_stream_is_terminal());
}
