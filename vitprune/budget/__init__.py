"""From a request (a keep ratio, MACs, a speed, whole tiles) to a pruning plan."""
