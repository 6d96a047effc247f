// Per-token streams of a batch and the packed axis, on which sequences lie one behind the other: moving between the two,
// reductions over sequences, and generalised advantages. See types.h for the conventions.
//
// The CUDA functions read and write nothing outside the arrays, whatever `cu_seqlens`, `starts` and `order` hold: where
// these are wrong, so are the results. The CPU functions trust them.
#pragma once

#include "types.h"

#ifdef __cplusplus
extern "C" {
#endif

// Sequence i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]) of the packed axis; it may be empty.
typedef struct {
  int64_t num_tokens, num_sequences;
  const int32_t* cu_seqlens;  // [S + 1], rising from 0 to N
} LeewayPacked;

// One value a token, of `width` bytes: 1, 2, 4 or 8.
typedef struct {
  const void* from;
  void* to;
  int32_t width;
  uint64_t fill;  // unpack: the value, in the first bytes, of positions that no sequence holds
} LeewayStream;

enum { LEEWAY_MOST_STREAMS = 16 };

// The loose axis, of `size` positions, holds sequence i from starts[i] on: padded, ragged or otherwise apart.
typedef struct {
  LeewayPacked packed;
  const int64_t* starts;  // [S], sequences do not overlap
  int64_t size;
  const int64_t* order;   // [S], unpack: the sequences by where they start, empty ones last
  int32_t num_streams;
  LeewayStream streams[LEEWAY_MOST_STREAMS];
} LeewayMove;

// What follows from where completions begin.
typedef struct {
  LeewayPacked packed;
  const int64_t* tokens;          // [N]
  const int64_t* prompt_lengths;  // [S]
  int64_t* position_ids;          // [N] from 0 in each sequence
  int64_t* labels;                // [N] the next token where that is of the completion, else -100
  float* mask;                    // [N] 1 where it is, else 0
  int64_t* sequence;              // [N] which sequence the token is of
} LeewayTokenLayout;

typedef enum { LEEWAY_SUM, LEEWAY_MEAN, LEEWAY_MAX } LeewayReduction;

// Elements count as much as `mask` says, 0 or 1; `type` is F32 or F64, sums are of F64.
typedef struct {
  LeewayPacked packed;
  LeewayReduction reduction;
  LeewayType type;
  const void* values;  // [N]
  const void* mask;    // [N]; null: all 1
  void* result;        // [S] of the elements that count; of none: 0, or -inf as the greatest
  void* count;         // [S] how many count
} LeewayReduce;

typedef struct {
  LeewayPacked packed;
  LeewayType type;
  const void* values;  // [S]
  const void* mask;    // [N]; null: all 1
  void* result;        // [N] each token's sequence's value, times the mask
} LeewaySpread;

// Advantages, backwards over each sequence: A = d + gamma lambda A', d = r + gamma V' - V, where A' and V' are those of
// the next token that the policy chose, 0 and `bootstrap` behind the last one. Tokens with mask 0, observations, have
// the A' that passes through them. `type`, F32 or F64, is that of all arrays; sums are of F64.
typedef struct {
  LeewayPacked packed;
  LeewayType type;
  double gamma;
  const void* rewards;        // [N]
  const void* values;         // [N]
  const void* mask;           // [N], 0 or 1; null: all 1
  const void* bootstrap;      // [S] value behind the last token; null: 0
  const void* lambda_critic;  // [S]
  const void* lambda_policy;  // [S]
  void* advantages;           // [N] A with lambda_policy
  void* returns;              // [N] A with lambda_critic, plus V
} LeewayGae;

// Packed tokens, or loose positions, [begin, end).
void leeway_pack_cpu(const LeewayMove*, int64_t begin, int64_t end);
void leeway_unpack_cpu(const LeewayMove*, int64_t begin, int64_t end);
// Sequences [begin, end).
void leeway_token_layout_cpu(const LeewayTokenLayout*, int64_t begin, int64_t end);
void leeway_reduce_cpu(const LeewayReduce*, int64_t begin, int64_t end);
void leeway_spread_cpu(const LeewaySpread*, int64_t begin, int64_t end);
void leeway_gae_cpu(const LeewayGae*, int64_t begin, int64_t end);

int leeway_pack_cuda(const LeewayMove*, void* stream);
int leeway_unpack_cuda(const LeewayMove*, void* stream);
int leeway_token_layout_cuda(const LeewayTokenLayout*, void* stream);
int leeway_reduce_cuda(const LeewayReduce*, void* stream);
int leeway_spread_cuda(const LeewaySpread*, void* stream);
int leeway_gae_cuda(const LeewayGae*, void* stream);

#ifdef __cplusplus
}
#endif
