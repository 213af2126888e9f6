"""What a user tells a program: where it comes from, and a sentence for what can't be."""
