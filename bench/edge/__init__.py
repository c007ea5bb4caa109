"""`python -m bench edge`: router and link over a null engine, beside Ray Serve's proxy and a bare echo."""
