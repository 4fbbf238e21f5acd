"""The checks of proposals: code is linted and run in a sandbox, texts are held to the policy."""
