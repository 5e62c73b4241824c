#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernel_testing.h"
#include "kernels/kernels.h"

namespace miniquant::kernels {
namespace {

TEST(Kernels, TableIsThatOfTheInstructionSetAskedFor) {
  for (const InstructionSet candidate : testing::supported_instruction_sets()) {
    EXPECT_EQ(kernels_for(candidate).instruction_set, candidate);
  }
}

TEST(Kernels, RefusesAnInstructionSetThatIsNotSupported) {
  std::vector<InstructionSet> candidates(kInstructionSets.begin(), kInstructionSets.end());
  candidates.push_back(static_cast<InstructionSet>(17));
  for (const InstructionSet candidate : candidates) {
    if (is_supported(candidate)) {
      continue;
    }
    try {
      kernels_for(candidate);
      ADD_FAILURE() << "no exception for " << name(candidate);
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(std::string(error.what()),
                std::string("kernels_for: expected a supported instruction set, but got '") + name(candidate) + "'");
    }
  }
}

TEST(Kernels, ChosenTableIsTheChosenInstructionSetsAndStays) {
  EXPECT_EQ(kernels().instruction_set, choose_instruction_set());
  EXPECT_EQ(&kernels(), &kernels());
}

// A panel of a triangle must be a whole number of tiles.
TEST(Kernels, TilesDivideThePanelsOfATriangle) {
  testing::for_each_instruction_set<float>([](const auto& kernel) { EXPECT_EQ(kPanelColumns % kernel.tile_rows, 0); });
  testing::for_each_instruction_set<double>([](const auto& kernel) { EXPECT_EQ(kPanelColumns % kernel.tile_rows, 0); });
}

TEST(Kernels, TypedKernelsAreThoseOfTheElementType) {
  const KernelTable& table = kernels();
  EXPECT_EQ(&typed_kernels<float>(table), &table.f32);
  EXPECT_EQ(&typed_kernels<double>(table), &table.f64);
}

}  // namespace
}  // namespace miniquant::kernels
