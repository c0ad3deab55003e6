/* ConvNeXt on the CPU: a packed network file, and sessions that run it. C99.

   Ownership: a model refers to the bytes it was opened from until it is closed; a session refers to its model. Close
   sessions before their model, and a model before its bytes are released.
   Threads: a model may be shared by any number of threads, each with a session of its own. A session is used by one
   thread at a time, and refuses to run for a second one; nobody closes it while it runs. It has threads of its own,
   which a fork does not inherit: create sessions after the fork.
   Errors: a function that can fail returns CNXT_OK or a code, and writes one line into `message` (always terminated;
   NULL is allowed). No exception leaves the library, and no input makes it crash: every offset, size and dimension of
   a file is checked before it is used. */
#ifndef CONVNEXT_DEPLOY_H
#define CONVNEXT_DEPLOY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CNXT_ABI 2
#define CNXT_API __attribute__((visibility("default")))

typedef enum cnxt_status {
  CNXT_OK = 0,
  CNXT_BAD_FILE = 1,     /* truncated, damaged, or of another version */
  CNXT_BAD_ARGUMENT = 2, /* a size, count or name that is not taken */
  CNXT_NO_MEMORY = 3,
  CNXT_NO_FILE = 4,    /* cannot be opened or read */
  CNXT_NO_THREADS = 5, /* the system refused to start one */
  CNXT_BUSY = 6,       /* another thread runs this session */
} cnxt_status;

typedef struct cnxt_model cnxt_model;
typedef struct cnxt_session cnxt_session;

typedef struct cnxt_info {
  uint32_t input; /* 0: float32 (N, C, H, W), normalized; 1: uint8 (N, H, W, C), raw pixels */
  uint32_t in_chans;
  uint32_t outputs;     /* 1, or 4 for feature maps */
  uint32_t channels[4]; /* of each output: (N, channels), or a map (N, channels, heights[i], widths[i]); 0: a map that
                           the network does not put out, whose pointer is not used */
  uint32_t heights[4], widths[4];   /* of the maps of a session, of the strides 4, 8, 16, 32; 0 without maps */
  uint32_t is_map;                  /* whether the outputs are maps */
  uint32_t operations;              /* in the file */
  uint32_t products[3];             /* matrix products in fp32, bf16, int8 */
  uint64_t multiply_accumulates[3]; /* of one image of the options' size, in fp32, bf16, int8; 0 for a model */
} cnxt_info;

typedef struct cnxt_options {
  uint32_t batch, height, width; /* images; pixels, at least 32 */
  uint32_t threads;              /* at least 1; the calling thread is one of them */
  const char *isa;               /* NULL: the best this CPU has; else one of `cnxt_isas` */
} cnxt_options;

/* What one part of one operation took. */
typedef struct cnxt_timing {
  uint32_t operation; /* index in the file */
  uint32_t part; /* 0 stem, 1 dwconv_norm, 2 expand, 3 grn, 4 project, 5 downsample, 6 head, 7 features, 8 waiting */
  uint32_t type; /* of the product: 0 fp32, 1 bf16, 2 int8; 3: it has none */
  uint32_t executed; /* the type it was multiplied in here: bf16 is 0 where the CPU path has no bf16 product */
  double ms;         /* on the calling thread */
} cnxt_timing;

/* A resize, and the window of its result that is computed. */
typedef struct cnxt_resize {
  uint32_t source_height, source_width; /* pixels */
  size_t row_bytes;                     /* from one row to the next */
  uint32_t pixel_bytes;                 /* 1: grey; 3: RGB; 4: RGB and a byte that is not looked at */
  uint32_t grey;                        /* whether RGB becomes grey before it is resized */
  uint32_t columns_first;               /* whether columns are resized before rows; Pillow before 13: never, later:
                                           where the height shrinks, by more than twice what the width does */
  uint32_t height, width;               /* of the whole resized image, pixels */
  uint32_t top, left, rows, columns;    /* of the window */
  uint32_t filter;                      /* 0 bilinear, 1 bicubic, 2 Lanczos with three lobes; all with antialiasing */
} cnxt_resize;

/* The paths this CPU has, best first, separated by spaces. */
CNXT_API const char *cnxt_isas(void);
/* One line on a path that this CPU has and the system refuses; empty: there is none. */
CNXT_API const char *cnxt_isas_refused(void);
/* One line on a path with more instructions that is slower here than the first of `cnxt_isas`; empty: there is none. */
CNXT_API const char *cnxt_isas_slower(void);

/* Open a packed network in memory. `data` is 64-byte aligned and stays as it is until the model is closed. */
CNXT_API int cnxt_model_open(const void *data, size_t bytes, cnxt_model **model, char *message, size_t size);
/* The same from a file, which is read into memory of the model's own. */
CNXT_API int cnxt_model_open_file(const char *path, cnxt_model **model, char *message, size_t size);
CNXT_API void cnxt_model_close(cnxt_model *model);
CNXT_API void cnxt_model_info(const cnxt_model *model, cnxt_info *info);

/* Plans all memory and starts the threads: nothing is allocated after this. */
CNXT_API int cnxt_session_open(const cnxt_model *model, const cnxt_options *options, cnxt_session **session,
                               char *message, size_t size);
CNXT_API void cnxt_session_close(cnxt_session *session);
CNXT_API void cnxt_session_info(const cnxt_session *session, cnxt_info *info);
CNXT_API const char *cnxt_session_isa(const cnxt_session *session);
/* Bytes of activations and scratch that the session has allocated. */
CNXT_API size_t cnxt_session_bytes(const cnxt_session *session);

/* One inference of a whole batch. `input` and `outputs[i]` are contiguous; outputs are float32. CNXT_BUSY: another
 * thread runs this session, and nothing was computed. */
CNXT_API int cnxt_session_run(cnxt_session *session, const void *input, float *const *outputs);
/* The same, timed: fills up to `capacity` entries and says how many there are. */
CNXT_API int cnxt_session_profile(cnxt_session *session, const void *input, float *const *outputs, cnxt_timing *timings,
                                  size_t capacity, size_t *count);

/* Resizes an image of 8 bits as Pillow does, to the bit. `out` is (1 or 3, rows, columns): the channels one after
 * another. Any number of threads may call it at once. `isa` as in `cnxt_options`. */
CNXT_API int cnxt_image_resize(const char *isa, const cnxt_resize *resize, const uint8_t *pixels, uint8_t *out,
                               char *message, size_t size);

#ifdef __cplusplus
}
#endif
#endif
