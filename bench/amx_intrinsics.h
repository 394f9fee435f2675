// Included before every file of llama.cpp. GCC 12's intrinsics that load AMX tiles do not tell the compiler which memory they
// read. It drops the stores before them, of the tiles' configuration first of all, and ggml's AMX kernels crash.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#undef _tile_loadd_internal
#undef _tile_stream_loadd_internal
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory")
#define _tile_loadd_internal(tile, base, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((long)(stride)) : "memory")
#define _tile_stream_loadd_internal(tile, base, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((long)(stride)) : "memory")
#endif
