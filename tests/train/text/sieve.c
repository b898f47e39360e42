/* Prime numbers below a limit, by the sieve of Eratosthenes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char *make_sieve(size_t limit) {
  unsigned char *composite = calloc(limit + 1, 1);
  if (composite == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  for (size_t p = 2; p * p <= limit; ++p) {
    if (composite[p]) continue;
    for (size_t multiple = p * p; multiple <= limit; multiple += p) {
      composite[multiple] = 1;
    }
  }
  return composite;
}

int main(int argc, char **argv) {
  size_t limit = argc > 1 ? strtoul(argv[1], NULL, 10) : 100;
  unsigned char *composite = make_sieve(limit);
  size_t count = 0;
  for (size_t n = 2; n <= limit; ++n) {
    if (!composite[n]) {
      printf("%zu\n", n);
      ++count;
    }
  }
  fprintf(stderr, "%zu primes up to %zu\n", count, limit);
  free(composite);
  return 0;
}
