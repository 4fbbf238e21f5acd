"""Messages between clients, workflows and activities, and the ids that they share.

Every model is frozen. A `Request` comes from outside: unknown fields are rejected, and the error
names the field, the rule and the remedy. A `Model` model comes from a history or from the product's
own code: a new field has a default, and no field is renamed while a history holds it
(docs/design/0012-unreadable-inputs.md).
"""
