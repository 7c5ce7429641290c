"""What is asked: prompts are read, judged line by line, and grouped into batches."""
