"""Everything that measures and nothing that learns: pictures, tokenizers, models. Importing it loads no torch."""
