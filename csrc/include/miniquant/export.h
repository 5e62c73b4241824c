#pragma once

// Marks what the shared library exports; everything else is hidden.
#define MINIQUANT_API __attribute__((visibility("default")))
