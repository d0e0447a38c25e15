"""What a variant is worth: error rates on trials, latency, memory."""
