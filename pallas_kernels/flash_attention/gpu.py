def why_not(q, k): return "x"
