"""The harness: proves on any stack that reused KV gives the answer recomputation would give."""
