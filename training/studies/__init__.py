"""Questions about batch norm, answered by experiment; a command and a page for each."""
