"""Is a Mixture-of-Experts layer on n ranks the same layer as on one? Of any module, through a small adapter."""
