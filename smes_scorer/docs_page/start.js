"use strict";

// No validator: it would send this document's address to another host.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null });
