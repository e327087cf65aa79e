/* SPDX-License-Identifier: Apache-2.0
 * A C99 program that found an installed copy with pkg-config: the sizes of its pages, and a refusal. */
#include <stdio.h>
#include <string.h>
#include <tqkv/tqkv.h>

int main(void) {
  tq_config config;
  tq_codec *codec = NULL;
  tq_layout layout = {sizeof layout};
  if (tq_config_init(&config, sizeof config, "k3v2") != TQ_OK) return 1;
  config.k.head_dim = 128;
  if (tq_create(&config, &codec) != TQ_OK) return fprintf(stderr, "%s\n", tq_last_error()), 1;
  if (tq_page_layout(codec, TQ_PAGES_CODED, &layout) != TQ_OK) return 1;
  printf("tqkv %u: %d bytes a token\n", tq_version(), (int)layout.bytes_per_token);
  if (layout.bytes_per_token != 84 || tq_abi_version() != TQKV_ABI_VERSION) return 1;
  if (tq_info(codec, NULL) != TQ_ERROR_NULL_POINTER || !*tq_last_error()) return 1;
  tq_destroy(codec);
  return 0;
}
