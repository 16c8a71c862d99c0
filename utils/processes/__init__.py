"""One process or several: who this one is, how they talk, how they stop."""
