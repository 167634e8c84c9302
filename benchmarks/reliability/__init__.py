"""A campaign to break the service and the fits, one file a kind of attack."""
