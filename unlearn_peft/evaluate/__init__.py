"""Is it forgotten, and what did it cost? Figures of a live base, each with its n and an interval, and attacks."""
