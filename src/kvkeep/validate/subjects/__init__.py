"""What `kvkeep check` judges, one module a kind: how it is told, reset and counted."""
