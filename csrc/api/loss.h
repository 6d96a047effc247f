// The token loss: see ../loss/token_loss.h for the mathematics and types.h for the conventions.
#pragma once

#include "types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  LEEWAY_REINFORCE,
  LEEWAY_IMPORTANCE,
  LEEWAY_PPO_CLIP,
  LEEWAY_CISPO,
  LEEWAY_ICEPOP,
  LEEWAY_DPPO,
  LEEWAY_SAPO,
  LEEWAY_GSPO,
  LEEWAY_GSPO_TOKEN
} LeewaySurrogate;

typedef enum {
  LEEWAY_UNCORRECTED,
  LEEWAY_DECOUPLED,
  LEEWAY_TIS,
  LEEWAY_ICEPOP_WEIGHT,
  LEEWAY_SEQUENCE,
  LEEWAY_SEQUENCE_MASK
} LeewayCorrection;

typedef enum { LEEWAY_NO_KL, LEEWAY_K1, LEEWAY_K2, LEEWAY_K3 } LeewayDivergence;

// One function from each slot of engine/algorithms; arguments stand in the order of the Python function's own.
typedef struct {
  int32_t surrogate, correction, divergence;
  int32_t num_bins;             // of the staleness histogram
  double surrogate_args[3];     // an argument of None is NaN
  double correction_args[3];
  double divergence_args[2];    // coefficient, corrected
  double entropy_coefficient;
} LeewayRecipe;

// What is known of N target tokens in S sequences. `type` (F32 or F64) is that of all arrays of numbers here.
typedef struct {
  int64_t num_tokens, num_sequences;
  const int32_t* cu_seqlens;   // [S + 1], rising from 0 to N
  const void* behaviour;       // [N] log-probability under the version that sampled the token
  const void* proximal;        // [N]; null: the policy's own
  const void* reference;       // [N]; null without a divergence
  const void* advantage;       // [N]
  const void* mask;            // [N], 0 or 1: what a masked token holds otherwise is not looked at
  const void* omega;           // [N] what the token counts in the loss, 0 where masked
  const int32_t* staleness;    // [N] the policy's version less the token's; null: unknown
  int32_t moved;               // the policy was updated since its version was made: no token is its own any more
  LeewayType type;
} LeewayTokens;

// N rows of V logits, one for each target token. A logit of -inf is a token that cannot be sampled; NaN, +inf or
// nothing but -inf makes all results of the row NaN, and a target outside the vocabulary all but entropy and lse.
typedef struct {
  const void* logits;          // [N, V]
  void* grad;                  // [N, V] d loss / d logits, may be `logits` where the types agree; null: not wanted
  int64_t num_rows, vocab, logits_stride, grad_stride;
  LeewayType logits_type, grad_type;
  const int64_t* targets;      // [N], 0..V-1
  double temperature;
  void* logprob;               // [N] log softmax(logits / temperature) of the target
  void* entropy;               // [N] of softmax(logits / temperature), in nats
  void* lse;                   // [N] log-sum-exp of logits / temperature
  LeewayType type;             // of the three, and of `slope_*`: F64 where the logits are, else F32
  const void* slope_logprob;   // [N] d loss / d logprob  } read by row_grad only
  const void* slope_entropy;   // [N] d loss / d entropy  } null: 0
} LeewayRows;

// What each token makes of its log-probability; 0 where masked, whatever the log-probability is. Any may be null.
typedef struct {
  void* loss;                  // [N] omega (w phi + beta k - eta H)
  void* ratio;                 // [N] pi / pi_proximal, which the surrogate clips; of both GSPO the sequence's
  void* coefficient;           // [N] d loss / d logprob
  void* slope_entropy;         // [N] d loss / d entropy
  double* health;              // [S, LEEWAY_HEALTH + num_bins] each sequence's sums over its unmasked tokens, then its
                               // staleness histogram, the last bin open: who adds the rows chooses the order
} LeewayTerms;

// Names of the sums in LeewayTerms.health, in order.
#define LEEWAY_HEALTH_NAMES                                                                                          \
  "tokens", "loss", "drift", "ratio", "ratio_squared", "own", "mismatch", "clipped", "weight", "rejected", "kl",     \
      "entropy", "drift_k1", "drift_k2", "drift_k3"
enum { LEEWAY_HEALTH = 15 };

// Stage A: logprob, entropy and lse of rows [begin, end).
void leeway_row_stats_cpu(const LeewayRows*, int64_t begin, int64_t end);
// Stage C: grad of rows [begin, end) from logits, lse, entropy and the two slopes; where both are 0, the logits are not
// read.
void leeway_row_grad_cpu(const LeewayRows*, int64_t begin, int64_t end);
// A, B and C of a row while it is in cache, on the CPU with the same bits as one after the other; only for recipes that
// look at one token at a time. Masked rows are not read: their results are 0. What else is wanted of the tokens,
// token_terms makes of `logprob` and `entropy`.
void leeway_row_loss_cpu(const LeewayRows*, const LeewayTokens*, const LeewayRecipe*, int64_t begin, int64_t end);
// Stage B over sequences [begin, end) given rows' logprob and entropy (null: 0).
void leeway_token_terms_cpu(const LeewayTokens*, const LeewayRecipe*, const void* logprob, const void* entropy,
                            const LeewayTerms*, int64_t begin, int64_t end);

int leeway_row_stats_cuda(const LeewayRows*, void* stream);
int leeway_row_grad_cuda(const LeewayRows*, void* stream);
int leeway_row_loss_cuda(const LeewayRows*, const LeewayTokens*, const LeewayRecipe*, void* stream);
int leeway_token_terms_cuda(const LeewayTokens*, const LeewayRecipe*, const void* logprob, const void* entropy,
                            const LeewayTerms*, void* stream);

#ifdef __cplusplus
}
#endif
