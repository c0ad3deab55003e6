"""Artifacts packed for other servers, a module each. None of them needs what `serve` needs."""
