"""From tokens to finished pieces on disk. Reached from outside as `igpt.siblings.sibling("generate")`."""

PART_OF = "igpt"
