"""HTTP: parse, call the broker, render. No rule lives here."""
