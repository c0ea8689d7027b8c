"""The ground floor: whole writes, bounded reads of what others made, and where the user's files lie."""
