"""Winners with their evidence: database, packs, and the dispatcher that serving code reads."""
