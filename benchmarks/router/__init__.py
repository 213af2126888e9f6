"""What the router costs: processor time per request and per event, and time added to each."""
