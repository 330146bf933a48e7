// One source, one machine-code version per vector width, chosen when the library is loaded.
#ifndef OMNIQUANT_MULTIVERSION_H
#define OMNIQUANT_MULTIVERSION_H

// Instruction sets, not "arch=": gcc matches an architecture only on its own maker's processors.
#if defined(OMNIQUANT_TARGET_CLONES)
#define OMNIQUANT_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define OMNIQUANT_MULTIVERSION
#endif

#endif
