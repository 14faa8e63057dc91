// Included before every source: stores past the cache are builtins, into which g++ puts no checks,
// so here they are ordinary ones. That an sfence orders them is thereby taken for granted.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#define _mm_stream_si128 _mm_store_si128
#endif
