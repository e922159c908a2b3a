"""Learning: the tokenizer, the token cache, the GPT. Reached from outside as `igpt.siblings.sibling("train")`."""

PART_OF = "igpt"
