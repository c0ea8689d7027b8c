"""An adapter on disk: read as untrusted, written whole or not at all, signed, shared, transformed."""
