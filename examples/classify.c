/* Classifies a JPEG with a packed ConvNeXt (format `native`, --input uint8), without Python. The image's largest centred
   square is averaged down to SIDE pixels. LIBRARY is what `convnext_deploy.native.library.build()` names.
     cc examples/classify.c -I convnext_deploy/native/csrc LIBRARY -ljpeg -o classify
     ./classify NETWORK 224 photo.jpg */
#include <stdio.h>
#include <stdlib.h>

#include <jpeglib.h>

#include "convnext_deploy.h"

/* (height, width, 3), to be freed; libjpeg itself ends the program where the file is no JPEG. */
static unsigned char *read_jpeg(FILE *file, int *height, int *width) {
  struct jpeg_decompress_struct jpeg;
  struct jpeg_error_mgr errors;
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_decompress(&jpeg);
  jpeg_stdio_src(&jpeg, file);
  jpeg_read_header(&jpeg, TRUE);
  jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&jpeg);
  *height = (int)jpeg.output_height, *width = (int)jpeg.output_width;
  unsigned char *pixels = malloc((size_t)*height * *width * 3);
  while (jpeg.output_scanline < jpeg.output_height) {
    unsigned char *row = pixels + (size_t)jpeg.output_scanline * *width * 3;
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  return pixels;
}

static void resize(const unsigned char *from, int height, int width, unsigned char *to, int side) {
  const int square = height < width ? height : width, top = (height - square) / 2, left = (width - square) / 2;
  for (int i = 0; i < side * side * 3; i++) {
    const int y0 = i / 3 / side * square / side, x0 = i / 3 % side * square / side;
    int y1 = (i / 3 / side + 1) * square / side, x1 = (i / 3 % side + 1) * square / side, sum = 0;
    if (y1 == y0) y1++;
    if (x1 == x0) x1++;
    for (int y = y0; y < y1; y++)
      for (int x = x0; x < x1; x++) sum += from[((size_t)(top + y) * width + left + x) * 3 + i % 3];
    to[i] = (unsigned char)((sum + (y1 - y0) * (x1 - x0) / 2) / ((y1 - y0) * (x1 - x0)));
  }
}

int main(int argc, char **argv) {
  char message[256];
  FILE *file = argc == 4 ? fopen(argv[3], "rb") : NULL;
  const int side = argc == 4 ? atoi(argv[2]) : 0;
  if (!file || side < 32) return fprintf(stderr, "usage: classify NETWORK SIDE PHOTO.jpg\n"), 2;
  cnxt_model *model;
  cnxt_session *session;
  cnxt_info info;
  const cnxt_options options = {.batch = 1, .height = side, .width = side, .threads = 2};
  if (cnxt_model_open_file(argv[1], &model, message, sizeof message)) return fprintf(stderr, "%s\n", message), 1;
  cnxt_model_info(model, &info);
  if (!info.input || info.in_chans != 3 || info.is_map) return fprintf(stderr, "expected a uint8 classifier\n"), 1;
  if (cnxt_session_open(model, &options, &session, message, sizeof message)) return fprintf(stderr, "%s\n", message), 1;
  int height, width, best = 0;
  unsigned char *photo = read_jpeg(file, &height, &width), *pixels = malloc((size_t)side * side * 3);
  float *logits = malloc(info.channels[0] * sizeof(float));
  resize(photo, height, width, pixels, side);
  cnxt_session_run(session, pixels, &logits);
  for (int i = 1; i < (int)info.channels[0]; i++) best = logits[i] > logits[best] ? i : best;
  printf("class %d, logit %.5f\n", best, logits[best]);
  cnxt_session_close(session);
  cnxt_model_close(model);
  free(photo), free(pixels), free(logits), fclose(file);
  return 0;
}
