"""Does the check find what it is there to find? Plants faults and counts how many were caught."""
