"""Campaigns that try to break the service and the fits; one file for each kind of attack."""
