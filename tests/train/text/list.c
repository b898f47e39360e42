/* A singly linked list of integers: push, reverse, sum, free. */
#include <stdio.h>
#include <stdlib.h>

struct node {
  int value;
  struct node *next;
};

static struct node *push(struct node *head, int value) {
  struct node *fresh = malloc(sizeof *fresh);
  if (fresh == NULL) abort();
  fresh->value = value;
  fresh->next = head;
  return fresh;
}

static struct node *reverse(struct node *head) {
  struct node *previous = NULL;
  while (head != NULL) {
    struct node *next = head->next;
    head->next = previous;
    previous = head;
    head = next;
  }
  return previous;
}

static long sum(const struct node *head) {
  long total = 0;
  for (; head != NULL; head = head->next) total += head->value;
  return total;
}

int main(void) {
  struct node *list = NULL;
  for (int i = 1; i <= 10; ++i) list = push(list, i);
  list = reverse(list);
  printf("the sum is %ld\n", sum(list));
  while (list != NULL) {
    struct node *next = list->next;
    free(list);
    list = next;
  }
  return 0;
}
