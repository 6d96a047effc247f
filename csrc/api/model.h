// Parts of a transformer's layer on the CPU, in F32 and F64: see the structs for the mathematics.
#pragma once

#include "types.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = rotate(w x / sqrt(mean(x^2) + eps)) for rows x of D numbers: H rows (heads) a token, T tokens. Without weight: no
// norm. Without cos: no rotation. With the halves (a, b) of a row, rotate(a, b) = (a cos - b sin, b cos + a sin), where
// cos and sin have D numbers a token too.
typedef struct {
  int64_t num_tokens, heads, width;
  const void* x;                // [T, H, D], tokens x_stride apart
  int64_t x_stride;
  const void* weight;           // [D] or null
  const void* cos;              // [T, D] or null
  const void* sin;
  double eps;
  void* y;                      // [T, H, D]
  LeewayType type;
} LeewayNorm;

// Weights' gradients are summed over blocks of so many tokens, whoever computes them.
enum { LEEWAY_NORM_BLOCK = 256 };

typedef struct {
  const void* dy;               // [T, H, D], tokens dy_stride apart
  int64_t dy_stride;
  void* dx;                     // [T, H, D]
  void* dweight;                // [ceil(T / LEEWAY_NORM_BLOCK), D]: a block's own sum; null without weight
} LeewayNormGrad;

void leeway_norm_cpu(const LeewayNorm*, int64_t begin, int64_t end);                             // of tokens
void leeway_norm_grad_cpu(const LeewayNorm*, const LeewayNormGrad*, int64_t begin, int64_t end);  // of blocks of tokens

// y = silu(gate) up, silu(g) = g / (1 + exp(-g)), N rows of F numbers.
typedef struct {
  int64_t num_rows, width;
  const void* gate;             // [N, F], rows gate_stride apart
  const void* up;               // [N, F], rows up_stride apart
  int64_t gate_stride, up_stride;
  void* y;                      // [N, F]
  LeewayType type;
} LeewaySwiglu;

typedef struct {
  const void* dy;               // [N, F]
  void* dgate;                  // [N, F], rows dgate_stride apart
  void* dup;                    // [N, F], rows dup_stride apart
  int64_t dgate_stride, dup_stride;
} LeewaySwigluGrad;

void leeway_swiglu_cpu(const LeewaySwiglu*, int64_t begin, int64_t end);                               // of rows
void leeway_swiglu_grad_cpu(const LeewaySwiglu*, const LeewaySwigluGrad*, int64_t begin, int64_t end);  // of rows

// out = softmax(scale q k^T) v over T tokens in S segments. A token sees its own segment up to itself and all of the
// segment that its own one names as prefix. A family is a segment without a prefix and those that name it.
typedef struct {
  int64_t num_families, heads, kv_heads, dim;
  const int64_t* cu_seqlens;    // [S + 1] bounds of the segments
  const int64_t* members;       // [S] the segments, family by family, the one without a prefix first
  const int64_t* bounds;        // [families + 1] bounds of the families in `members`
  const void* query;            // [T, H, D], tokens query_stride apart
  const void* key;              // [T, H_kv, D], tokens key_stride apart
  const void* value;            // [T, H_kv, D], tokens value_stride apart
  int64_t query_stride, key_stride, value_stride;
  double scale;
  void* out;                    // [T, H, D]
  void* lse;                    // [T, H] logarithm of the sum of exp(scale q k^T)
  LeewayType type;
} LeewayAttention;

typedef struct {
  const void* dout;             // [T, H, D]
  void* dquery;                 // [T, H, D]
  void* dkey;                   // [T, H_kv, D]
  void* dvalue;                 // [T, H_kv, D]
} LeewayAttentionGrad;

// Of pairs (family, kept head): pair p is family p / H_kv, head p % H_kv.
void leeway_attention_cpu(const LeewayAttention*, int64_t begin, int64_t end);
void leeway_attention_grad_cpu(const LeewayAttention*, const LeewayAttentionGrad*, int64_t begin, int64_t end);

// One new token of each of N sequences, whose keys and values lie in slots 0 to N - 1 of a cache: adds the token's own
// at place lengths[n], then out = softmax(scale q k^T) v over places 0 to lengths[n].
typedef struct {
  int64_t num, heads, kv_heads, dim, context;
  const int64_t* lengths;       // [N] tokens that are kept already, below `context`
  const void* query;            // [N, H, D], tokens query_stride apart
  const void* key;              // [N, H_kv, D], tokens key_stride apart
  const void* value;            // [N, H_kv, D], tokens value_stride apart
  int64_t query_stride, key_stride, value_stride;
  void* keys;                   // [slots, H_kv, context, D]
  void* values;
  double scale;
  void* out;                    // [N, H, D]
  LeewayType type;
} LeewayDecode;

void leeway_decode_cpu(const LeewayDecode*, int64_t begin, int64_t end);  // of sequences

#ifdef __cplusplus
}
#endif
