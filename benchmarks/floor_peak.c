/* What this machine can do at most, per second, on N threads: fused multiply-adds in float32, 8-bit
   dot products (AVX-512 VNNI), and bytes read from memory. One JSON line. Built and run by
   floor.py; x86-64 with AVX-512 VNNI, else the figures that need it are null.

   Arithmetic stays in registers (16 independent accumulators hide the latency); reads go once over
   a block per thread that is far larger than any cache. The best of many short tries counts: a
   floor must not be soft. */
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const double kSecondsPerFigure = 3;
enum { ACCUMULATORS = 16, STEPS = 1000000, MAX_THREADS = 256 };
static const size_t kBlockBytes = (size_t)256 << 20;

static pthread_barrier_t barrier;
static char* blocks[MAX_THREADS];
static double seconds[MAX_THREADS];
static volatile float sink;
static int kind;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define MEASURED 1
/* The empty asm keeps each step (else the compiler may fold the loop) and each sum in a register.
 */
static void multiply_add(void) {
  __m512 sums[ACCUMULATORS], a = _mm512_set1_ps(1.0001f), b = _mm512_set1_ps(1e-9f);
#pragma GCC unroll 16
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_set1_ps((float)i);
  for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < ACCUMULATORS; ++i) {
      sums[i] = _mm512_fmadd_ps(a, b, sums[i]); /* a * b + sum */
      __asm__ volatile("" : "+v"(sums[i]));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ACCUMULATORS; ++i) sink += _mm512_reduce_add_ps(sums[i]);
}

static void dot_products(void) {
  __m512i sums[ACCUMULATORS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
#pragma GCC unroll 16
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_set1_epi32(i);
  for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < ACCUMULATORS; ++i) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
      __asm__ volatile("" : "+v"(sums[i]));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ACCUMULATORS; ++i) sink += (float)_mm512_reduce_add_epi32(sums[i]);
}

static void read_block(const char* block) {
  __m512i sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = _mm512_setzero_si512();
  for (size_t at = 0; at < kBlockBytes; at += 8 * 64)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      sums[i] = _mm512_xor_si512(sums[i], _mm512_load_si512(block + at + i * 64));
  for (int i = 0; i < 8; ++i) sink += (float)_mm512_reduce_add_epi32(sums[i]);
}
#else
#define MEASURED 0
static void multiply_add(void) {}
static void dot_products(void) {}
static void read_block(const char* block) { (void)block; }
#endif

static void* work(void* argument) {
  const int number = (int)(intptr_t)argument;
  pthread_barrier_wait(&barrier);
  const double start = now();
  if (kind == 0) multiply_add();
  if (kind == 1) dot_products();
  if (kind == 2) read_block(blocks[number]);
  seconds[number] = now() - start;
  return NULL;
}

/* Units of work per second of all threads together, the slowest thread's time counted. */
static double best_rate(int threads, double units_per_thread) {
  double best = 0;
  for (const double end = now() + kSecondsPerFigure; now() < end;) {
    pthread_t ids[MAX_THREADS];
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int i = 0; i < threads; ++i) pthread_create(&ids[i], NULL, work, (void*)(intptr_t)i);
    double slowest = 0;
    for (int i = 0; i < threads; ++i) {
      pthread_join(ids[i], NULL);
      if (seconds[i] > slowest) slowest = seconds[i];
    }
    pthread_barrier_destroy(&barrier);
    if (threads * units_per_thread / slowest > best) best = threads * units_per_thread / slowest;
  }
  return best;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 1;
  if (threads < 1 || threads > MAX_THREADS) return 2;
  if (!MEASURED) {
    puts("{\"float32_ops\": null, \"int8_ops\": null, \"read_bytes\": null}");
    return 0;
  }
  for (int i = 0; i < threads; ++i) {
    blocks[i] = aligned_alloc(4096, kBlockBytes);
    if (!blocks[i]) return 1;
    memset(blocks[i], i + 1, kBlockBytes);
  }
  const double steps = (double)STEPS * ACCUMULATORS;
  kind = 0;
  const double float32_ops = best_rate(threads, steps * 16 * 2);
  kind = 1;
  const double int8_ops = best_rate(threads, steps * 64 * 2);
  kind = 2;
  const double read_bytes = best_rate(threads, (double)kBlockBytes);
  printf("{\"float32_ops\": %.6e, \"int8_ops\": %.6e, \"read_bytes\": %.6e}\n", float32_ops,
         int8_ops, read_bytes);
  return 0;
}
