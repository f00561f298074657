"""From a problem to proven winners: search, compile, gate, clock."""
