-- A policy store of schema version 1, as the version before `trusted_keys` wrote it (sqlite3's dump).
BEGIN TRANSACTION;
CREATE TABLE unlearn_adapters (
	name VARCHAR(64) NOT NULL,
	path TEXT NOT NULL,
	sha256 VARCHAR(64),
	PRIMARY KEY (name)
);
INSERT INTO "unlearn_adapters" VALUES('hp','/srv/hp','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa');
INSERT INTO "unlearn_adapters" VALUES('news','/srv/news',NULL);
CREATE TABLE unlearn_forgets (
	tenant VARCHAR(64) NOT NULL,
	adapter VARCHAR(64) NOT NULL,
	strength DOUBLE NOT NULL CHECK (strength > 0),
	PRIMARY KEY (tenant, adapter),
	FOREIGN KEY(tenant) REFERENCES unlearn_tenants (name),
	FOREIGN KEY(adapter) REFERENCES unlearn_adapters (name)
);
INSERT INTO "unlearn_forgets" VALUES('acme','hp',0.5);
CREATE TABLE unlearn_history (
	revision INTEGER NOT NULL,
	at VARCHAR(32) NOT NULL,
	who TEXT NOT NULL,
	action VARCHAR(16) NOT NULL,
	what JSON NOT NULL,
	why TEXT NOT NULL,
	PRIMARY KEY (revision)
);
INSERT INTO "unlearn_history" VALUES(1,'2026-11-26T04:48:41.864+00:00','tester','adapter','{"adapter": "hp", "path": "/srv/hp", "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "before": null}','a test');
INSERT INTO "unlearn_history" VALUES(2,'2026-11-26T04:48:41.939+00:00','tester','adapter','{"adapter": "news", "path": "/srv/news", "sha256": null, "before": null}','a test');
INSERT INTO "unlearn_history" VALUES(3,'2026-11-26T04:48:41.944+00:00','tester','add','{"tenant": "acme"}','a test');
INSERT INTO "unlearn_history" VALUES(4,'2026-11-26T04:48:41.948+00:00','tester','add','{"tenant": "globex"}','a test');
INSERT INTO "unlearn_history" VALUES(5,'2026-11-26T04:48:41.953+00:00','tester','forget','{"tenant": "acme", "adapter": "hp", "strength": 0.5, "before": null}','a test');
INSERT INTO "unlearn_history" VALUES(6,'2026-11-26T04:48:41.959+00:00','tester','key','{"tenant": "acme", "key": "495158eaecaa"}','a test');
CREATE TABLE unlearn_keys (
	digest VARCHAR(64) NOT NULL,
	tenant VARCHAR(64) NOT NULL,
	PRIMARY KEY (digest),
	FOREIGN KEY(tenant) REFERENCES unlearn_tenants (name)
);
INSERT INTO "unlearn_keys" VALUES('495158eaecaa8c929c391ff45b021847c581ce6e355039551ff96372b781238d','acme');
CREATE TABLE unlearn_state (
	id INTEGER NOT NULL CHECK (id = 1),
	schema_version INTEGER NOT NULL,
	revision INTEGER NOT NULL,
	token VARCHAR(16) NOT NULL,
	PRIMARY KEY (id)
);
INSERT INTO "unlearn_state" VALUES(1,1,6,'cd4af429280d2cc0');
CREATE TABLE unlearn_tenants (
	name VARCHAR(64) NOT NULL,
	PRIMARY KEY (name)
);
INSERT INTO "unlearn_tenants" VALUES('acme');
INSERT INTO "unlearn_tenants" VALUES('globex');
CREATE TRIGGER unlearn_history_UPDATE BEFORE UPDATE ON unlearn_history BEGIN SELECT RAISE(ABORT, 'the history is only added to'); END;
CREATE TRIGGER unlearn_history_DELETE BEFORE DELETE ON unlearn_history BEGIN SELECT RAISE(ABORT, 'the history is only added to'); END;
COMMIT;
