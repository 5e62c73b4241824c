#pragma once

// The whole library. The same functions are registered with PyTorch's dispatcher as `miniquant::<name>`.
#include <miniquant/build.h>
#include <miniquant/gptq.h>
#include <miniquant/grid.h>
#include <miniquant/hessian.h>
#include <miniquant/loss.h>
#include <miniquant/names.h>
#include <miniquant/options.h>
#include <miniquant/packing.h>
#include <miniquant/presets.h>
#include <miniquant/ridge.h>
#include <miniquant/superblocks.h>
