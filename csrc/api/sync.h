// Weights into a flat bucket of bytes: cast, checked and, as a delta, compared with the version before.
//
// A bucket is what a version of the weights looks like on its way: tensors at given places, zeros between them. It is
// cut into blocks of LEEWAY_BLOCK_UNITS units of 2 bytes. `position` is the place of the bucket's first byte in the
// whole payload, a multiple of 8: sums over a payload's pieces, added mod 2^64, are the sum over the payload, as long
// as only the last piece's size is no multiple of 8. ../sync/checksum.h says what is summed.
#pragma once

#include "types.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  LEEWAY_BLOCK_UNITS = 65536,   // offsets within a block have 16 bits
  LEEWAY_BLOCK_BYTES = 2 * LEEWAY_BLOCK_UNITS,
  LEEWAY_STRETCH_BYTES = 16384, // what a CUDA block makes at a time
  LEEWAY_BUCKET_ALIGNMENT = 16, // of a bucket's memory and of every tensor's place in it
  LEEWAY_TILE = 128             // rows and columns that share an fp8 scale
};

typedef enum { LEEWAY_AS_IS, LEEWAY_TO_BF16, LEEWAY_TO_F32, LEEWAY_TO_FP8 } LeewayFormat;

// One tensor and its place. To bf16 and fp32 it is cast from F64, F32 or BF16: to nearest, ties to even, NaN stays NaN.
// To fp8 (e4m3fn) it is a matrix, each element divided by the scale of its tile of 128 x 128: to nearest, ties to even,
// beyond 448 to 448, NaN and infinity to NaN. A tile's scale is the greatest finite magnitude / 448, or 1 where that is
// below the smallest normal float.
typedef struct {
  const void* data;             // aligned to its elements
  float* scales;                // fp8: [ceil(rows / 128), ceil(columns / 128)]
  int64_t begin, end;           // the bucket's bytes that it fills; zeros follow up to the next one's begin
  int64_t columns;              // fp8
  int64_t first_tile;           // fp8 tiles of all tensors before it
  int32_t type;                 // LeewayType, unless it is taken as it is
  int32_t format;               // LeewayFormat
} LeewayPlaced;

typedef struct {
  const LeewayPlaced* tensors;  // [num_tensors], rising, none over another; on CUDA in device memory
  int64_t num_tensors;
  int64_t num_tiles;            // of all fp8 tensors
  uint8_t* bytes;               // [num_bytes]
  int64_t num_bytes, position;
} LeewayBucket;

// The units that differ between two versions of a bucket, by block and rising within it.
typedef struct {
  const int64_t* starts;        // [blocks + 1] the number of changes before each block, and of all
  const uint16_t* offsets;      // [num_changes] of the unit within its block
  const uint16_t* values;       // [num_changes] the unit's new bits
  int64_t num_changes;
} LeewayChanges;

// Writes the scales of fp8 tiles [begin, end).
void leeway_scales_cpu(const LeewayBucket*, int64_t begin, int64_t end);
// Writes blocks [begin, end) of the bucket; their part of the sum. Scales are read.
uint64_t leeway_flatten_cpu(const LeewayBucket*, int64_t begin, int64_t end);
// The same where the bucket holds another version: only what differs is written, and told one after the other in
// `offsets` and `values` (room for all units of the blocks), with the number of each block in counts[0 .. end - begin).
uint64_t leeway_delta_cpu(const LeewayBucket*, int64_t begin, int64_t end, uint32_t* counts, uint16_t* offsets,
                          uint16_t* values);
// The sum over `num_bytes` bytes at `position`, a multiple of 8.
uint64_t leeway_checksum_cpu(const void* bytes, int64_t num_bytes, int64_t position);
// The first change in blocks [begin, end) that is outside the bucket or not above the one before it; -1: none.
int64_t leeway_find_misfit_cpu(const LeewayBucket*, const LeewayChanges*, int64_t begin, int64_t end);
// Writes the changes of blocks [begin, end), which fit; the sum's change.
uint64_t leeway_apply_cpu(const LeewayBucket*, const LeewayChanges*, int64_t begin, int64_t end);
// A payload's digest from its sum.
uint64_t leeway_digest(uint64_t sum, int64_t num_bytes);

// `sum` is device memory; each call adds its part to it.
int leeway_scales_cuda(const LeewayBucket*, void* stream);
int leeway_flatten_cuda(const LeewayBucket*, uint64_t* sum, void* stream);
// The changes of all blocks one after the other, of which the first `capacity` are written; counts [blocks] is zero
// before. `scratch` is zeroed device memory of leeway_delta_scratch(num_bytes) bytes.
static inline int64_t leeway_delta_scratch(int64_t num_bytes) {
  return 8 * (1 + (num_bytes + LEEWAY_STRETCH_BYTES - 1) / LEEWAY_STRETCH_BYTES);
}
int leeway_delta_cuda(const LeewayBucket*, uint32_t* counts, uint16_t* offsets, uint16_t* values, int64_t capacity,
                      uint64_t* sum, void* scratch, void* stream);
int leeway_checksum_cuda(const void* bytes, int64_t num_bytes, int64_t position, uint64_t* sum, void* stream);
// Applies all changes, or none where one does not fit: `misfits` is zero before, and how many there are afterwards.
int leeway_apply_cuda(const LeewayBucket*, const LeewayChanges*, uint64_t* sum, uint32_t* misfits, void* stream);

#ifdef __cplusplus
}
#endif
