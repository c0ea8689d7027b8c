"""Adapters to and from elsewhere: the Hub, HTTPS mirrors, archives, folders."""
