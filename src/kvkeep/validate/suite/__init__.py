"""What all suites share: how one is declared, what it is given, and what it returns."""
