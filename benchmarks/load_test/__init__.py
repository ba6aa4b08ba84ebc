"""Requests at a rate the server does not choose: what is answered in time, and what faults do."""
