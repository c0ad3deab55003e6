/* The class of an image by a packed ConvNeXt (format `native`, exported with --input uint8), without Python.
   The image is a binary PPM, or PGM for a grey network, of the size that the network was exported for. */
#include <stdio.h>
#include <stdlib.h>

#include <convnext_deploy.h>

int main(int argc, char **argv) {
  char message[256] = "", kind = 0;
  unsigned width = 0, height = 0, best = 0;
  cnxt_model *model = NULL;
  cnxt_session *session = NULL;
  cnxt_info info;
  FILE *file = argc == 3 ? fopen(argv[2], "rb") : NULL;
  if (!file || fscanf(file, "P%c %u %u 255%*c", &kind, &width, &height) != 3 || width > 8192 || height > 8192)
    return fprintf(stderr, "usage: classify model.cnxt IMAGE.ppm\n"), 2;
  if (cnxt_model_open_file(argv[1], &model, message, sizeof message)) return fprintf(stderr, "%s\n", message), 1;
  cnxt_model_info(model, &info);
  if (info.input != 1 || info.is_map || info.in_chans != (kind == '6' ? 3u : 1u))
    return fprintf(stderr, "expected a uint8 classifier of as many channels as the image has\n"), 1;
  const cnxt_options options = {.batch = 1, .height = height, .width = width, .threads = 1, .isa = NULL};
  if (cnxt_session_open(model, &options, &session, message, sizeof message)) return fprintf(stderr, "%s\n", message), 1;
  const size_t bytes = (size_t)width * height * info.in_chans;
  unsigned char *pixels = malloc(bytes); /* (1, height, width, channels) */
  float *logits = malloc(info.channels[0] * sizeof(float));
  if (!pixels || !logits || fread(pixels, 1, bytes, file) != bytes) return fprintf(stderr, "%s is too short\n", argv[2]), 1;
  if (cnxt_session_run(session, pixels, &logits)) return fprintf(stderr, "not run\n"), 1;
  for (unsigned i = 1; i < info.channels[0]; i++) best = logits[i] > logits[best] ? i : best;
  printf("class %u, logit %.5f\n", best, logits[best]);
  cnxt_session_close(session);
  cnxt_model_close(model);
  free(pixels), free(logits), fclose(file);
  return 0;
}
