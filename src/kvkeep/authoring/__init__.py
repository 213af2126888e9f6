"""Makes cartridges: by a prefill, by training, out of others. torch and transformers live here."""
