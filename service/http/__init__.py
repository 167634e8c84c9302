"""From the socket to a handler: connections, admission, dispatch, workers."""
