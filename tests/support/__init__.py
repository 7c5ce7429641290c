"""What the tests share: a billing teacher, a tiny tokenizer, real parts, waits with a deadline."""
