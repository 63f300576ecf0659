-- What a role may do that a policy does not say: rows of `fact`, for a reader, and `remedy`, the statement that ends it.
--   $1  the role's name
--   $2  the schemas that it may read
--   $3  tables that it may not, as `name` or `schema.name`, in any case
--   $4  how many connections it may have
-- A role without memberships that owns nothing has what is granted to itself or to PUBLIC, and no more: so that is all
-- that is looked for. It works on Postgres 15 to 18, for any role, and reads catalogs alone. search_path must be
-- pg_catalog, so that names come out with their schema. What initdb makes has an oid below 16384.
with recursive
me as (select * from pg_roles where rolname = $1::text),
grantees (oid, name) as (
  select 0::oid, 'PUBLIC' union all select oid, format('%I', rolname) from me
),
policy (schemas, tables, connections) as (values ($2::text[], $3::text[], $4::int)),
schemas as (
  select oid, nspname, nspacl, nspname in ('pg_catalog', 'information_schema') as is_system,
    nspname = any (policy.schemas) as is_allowed
  from pg_namespace, policy
),
-- What holds rows of a blocked table: itself, what is below it (partitions, children), and what is above, which shows
-- them without a privilege on them being asked for.
blocked as (
  select c.oid from pg_class c join schemas n on n.oid = c.relnamespace, policy, unnest(policy.tables) as entry
  where c.relkind in ('r', 'p', 'v', 'm', 'f')
    -- A name's own collation knows the letters A to Z alone.
    and (lower(entry) = lower((n.nspname || '.' || c.relname) collate "default")
      or lower(entry) = lower(c.relname collate "default") and not n.is_system)
),
below as (select oid from blocked union select i.inhrelid from below b join pg_inherits i on i.inhparent = b.oid),
above as (select oid from blocked union select i.inhparent from above a join pg_inherits i on i.inhrelid = a.oid),
-- And the views that read it, by way of others too. One that asks for its reader's own privileges is only a step: a
-- materialized view above it holds what its owner may read.
showing as (
  select oid from below union select oid from above
  union
  select w.ev_class from showing s
    join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = s.oid and d.classid = 'pg_rewrite'::regclass
    join pg_rewrite w on w.oid = d.objid and w.ev_type = '1'
),
forbidden as (
  select s.oid from showing s join pg_class c on c.oid = s.oid
  where s.oid in (select oid from blocked)
    or not exists (select from pg_options_to_table(c.reloptions)
      where case when option_name = 'security_invoker' then option_value::bool else false end)
  union
  -- In a database made before 15.7 or 16.3 these show everybody common values of any table (CVE-2024-4317).
  select v.oid from unnest(array['pg_stats_ext', 'pg_stats_ext_exprs']::regclass[]) as v (oid)
  where position('pg_has_role' in pg_get_viewdef(v.oid)) = 0
),
-- What Postgres and its extensions grant by themselves; it notes nothing of information_schema.
initial as (
  select i.classoid, i.objoid, i.objsubid, a.grantee, a.privilege_type
  from pg_init_privs i cross join lateral aclexplode(i.initprivs) a
  union all
  select 'pg_class'::regclass, c.oid, 0, 0, 'SELECT'
  from pg_class c where c.relnamespace = 'information_schema'::regnamespace and c.oid < 16384
),
relation_grants as (
  select c.oid, n.is_system, n.is_allowed, 0 as attnum, null::name as attname, a.grantee, a.privilege_type, a.is_grantable,
    nullif(a.grantor, c.relowner) as grantor, case c.relkind when 'S' then 'SEQUENCE' else 'TABLE' end as kind
  from pg_class c join schemas n on n.oid = c.relnamespace cross join lateral aclexplode(c.relacl) a
  where c.relacl is not null and a.grantee in (select oid from grantees)
  union all
  select c.oid, n.is_system, n.is_allowed, t.attnum, t.attname, a.grantee, a.privilege_type, a.is_grantable,
    nullif(a.grantor, c.relowner), 'TABLE'
  from pg_attribute t join pg_class c on c.oid = t.attrelid join schemas n on n.oid = c.relnamespace
    cross join lateral aclexplode(t.attacl) a
  where t.attacl is not null and not t.attisdropped and a.grantee in (select oid from grantees)
),
excess_relations as (
  select g.* from relation_grants g
  where g.oid in (select oid from forbidden)
    or g.is_grantable
    or not g.is_system and (g.privilege_type <> 'SELECT' or not g.is_allowed)
    or g.is_system and (g.oid, g.attnum, g.grantee, g.privilege_type) not in (
      select i.objoid, i.objsubid, i.grantee, i.privilege_type from initial i where i.classoid = 'pg_class'::regclass)
),
-- A routine, and what it calls whoever calls it: an aggregate's functions are its owner's to call.
bodies (oid, body) as (
  select oid, oid from pg_proc
  union
  select a.aggfnoid, f.body from pg_aggregate a cross join lateral unnest(array[
    a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, a.aggdeserialfn, a.aggmtransfn, a.aggminvtransfn,
    a.aggmfinalfn]::oid[]) as f (body)
  where f.body <> 0
),
-- Extensions whose functions compute, or ask for the caller's own privileges.
harmless (name) as (
  values ('bloom'), ('btree_gin'), ('btree_gist'), ('citext'), ('cube'), ('dict_int'), ('dict_xsyn'), ('earthdistance'),
    ('fuzzystrmatch'), ('hstore'), ('intagg'), ('intarray'), ('isn'), ('ltree'), ('pg_stat_statements'), ('pg_trgm'),
    ('pgcrypto'), ('plpgsql'), ('postgis'), ('seg'), ('tablefunc'), ('tsm_system_rows'), ('tsm_system_time'),
    ('unaccent'), ('uuid-ossp'), ('vector')
),
risks (oid, risk) as (
  select b.oid, case
      when p.prosecdef then 'runs with the rights of its owner'
      when l.lanispl and not l.lanpltrusted then 'is of a language without limits'
      when p.oid >= 16384 then 'is native code that is not known to be harmless'
      when p.proname like '%advisory%' then 'holds up others, and can take all the locks that there are'
      when p.proname like '%backend' then 'ends what others of its role do'
      else 'writes' end
  from bodies b join pg_proc p on p.oid = b.body join pg_language l on l.oid = p.prolang
  where p.prosecdef or l.lanispl and not l.lanpltrusted
    or l.lanname in ('c', 'internal') and p.prokind <> 'a' and p.oid >= 16384 and not exists (
      select from pg_depend d left join pg_extension e on e.oid = d.refobjid and d.refclassid = 'pg_extension'::regclass
      where d.classid = 'pg_proc'::regclass and d.objid = p.oid
        -- Or made with a type, as every range type's constructors are.
        and (d.deptype = 'e' and e.extname in (select name from harmless)
          or d.deptype = 'i' and d.refclassid = 'pg_type'::regclass))
    -- These ask for no other privilege. What the last ones do cannot be rolled back.
    or p.oid < 16384 and (p.proname in ('lo_creat', 'lo_create', 'lo_from_bytea', 'pg_logical_emit_message',
      'pg_cancel_backend', 'pg_terminate_backend') or p.proname ~ '^pg_(try_)?advisory_(xact_)?lock')
  union
  select p.oid, 'is kept from others'
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace and n.nspname in ('pg_catalog', 'information_schema')
    join pg_init_privs i on i.classoid = 'pg_proc'::regclass and i.objoid = p.oid
    cross join lateral aclexplode(p.proacl) a
  where a.grantee in (select oid from grantees) and (p.oid, a.grantee, a.privilege_type) not in (
    select j.objoid, j.grantee, j.privilege_type from initial j where j.classoid = 'pg_proc'::regclass)
),
object_grants (fact, kind, object, grantee, privilege) as (
  select 'the database ' || d.datname, 'DATABASE', format('%I', d.datname), a.grantee, a.privilege_type
  from pg_database d cross join lateral aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
  where d.datallowconn and case when d.datname = current_database()
    then a.privilege_type <> 'CONNECT' or a.is_grantable else a.privilege_type = 'CONNECT' end
  union all
  select 'the schema ' || n.nspname, 'SCHEMA', format('%I', n.nspname), a.grantee, a.privilege_type
  from schemas n cross join lateral aclexplode(n.nspacl) a
  where a.privilege_type <> 'USAGE' or a.is_grantable or not (n.is_allowed or n.is_system)
  union all
  select 'the foreign-data wrapper ' || fdwname, 'FOREIGN DATA WRAPPER', format('%I', fdwname), a.grantee, a.privilege_type
  from pg_foreign_data_wrapper cross join lateral aclexplode(fdwacl) a
  union all
  select 'the foreign server ' || srvname, 'FOREIGN SERVER', format('%I', srvname), a.grantee, a.privilege_type
  from pg_foreign_server cross join lateral aclexplode(srvacl) a
  union all
  select 'the tablespace ' || spcname, 'TABLESPACE', format('%I', spcname), a.grantee, a.privilege_type
  from pg_tablespace cross join lateral aclexplode(spcacl) a
  union all
  select 'the large object ' || oid, 'LARGE OBJECT', oid::text, a.grantee, a.privilege_type
  from pg_largeobject_metadata cross join lateral aclexplode(lomacl) a
  union all
  select 'the parameter ' || parname, 'PARAMETER', parname, a.grantee, a.privilege_type
  from pg_parameter_acl cross join lateral aclexplode(paracl) a
),
findings (part, fact, remedy) as (
  select 1, format('the role is %s', attribute), format('ALTER ROLE %I NO%s', rolname, attribute)
  from me cross join lateral (values ('SUPERUSER', rolsuper), ('CREATEROLE', rolcreaterole), ('CREATEDB', rolcreatedb),
    ('REPLICATION', rolreplication), ('BYPASSRLS', rolbypassrls)) as attributes (attribute, is_set)
  where is_set
  union all
  select 1, 'the role may have ' || case when rolconnlimit < 0 then 'any number of' else rolconnlimit::text end || ' connections',
    format('ALTER ROLE %I CONNECTION LIMIT %s', rolname, connections)
  from me, policy where rolconnlimit not between 0 and connections
  union all
  select 1, 'the role may fill the disk with temporary files',
    format('ALTER ROLE %I IN DATABASE %I SET temp_file_limit = ''1GB''', rolname, current_database())
  from me where '-1' = coalesce((
      select o.option_value from pg_db_role_setting s cross join lateral pg_options_to_table(s.setconfig) o
      where s.setrole = me.oid and (s.setdatabase = 0 or s.setdatabase = (
          select d.oid from pg_database d where d.datname = current_database())) and o.option_name = 'temp_file_limit'
      order by s.setdatabase desc limit 1), current_setting('temp_file_limit'))
  union all
  select 2, 'the role is a member of ' || r.rolname, format('REVOKE %I FROM %I', r.rolname, me.rolname)
    || case when current_setting('server_version_num')::int >= 160000 then format(' GRANTED BY %I', g.rolname) else '' end
  from me join pg_auth_members m on m.member = me.oid join pg_roles r on r.oid = m.roleid
    left join pg_roles g on g.oid = m.grantor
  union all
  select distinct 3, 'the role owns something in ' || coalesce('the database ' || d.datname, 'what all databases share'),
    case when coalesce(d.datname, current_database()) = current_database()
      then format('REASSIGN OWNED BY %I TO CURRENT_USER', me.rolname)
      else format('-- in the database %I: REASSIGN OWNED BY %I TO CURRENT_USER', d.datname, me.rolname) end
  from me join pg_shdepend s on s.refclassid = 'pg_authid'::regclass and s.refobjid = me.oid and s.deptype = 'o'
    left join pg_database d on d.oid = s.dbid
  union all
  select 4, format('%s has %s on %s', g.name, string_agg(distinct o.privilege, ', '), o.fact),
    format('REVOKE %s ON %s %s FROM %s', string_agg(distinct o.privilege, ', '), o.kind, o.object, g.name)
  from object_grants o join grantees g on g.oid = o.grantee group by g.name, o.fact, o.kind, o.object
  union all
  select 5, format('%s has %s on %s', g.name, string_agg(distinct e.privilege_type, ', '), e.oid::regclass)
      || coalesce(' (' || e.attname || ')', ''),
    -- A superuser's REVOKE ends what the owner has granted, and not what somebody else has.
    coalesce('SET ROLE ' || quote_ident(pg_get_userbyid(e.grantor)) || '; ', '')
      || format('REVOKE %s ON %s %s FROM %s',
      string_agg(distinct e.privilege_type || coalesce(' (' || quote_ident(e.attname) || ')', ''), ', '), e.kind, e.oid::regclass, g.name)
      || case when e.grantor is null then '' else '; RESET ROLE' end
  from excess_relations e join grantees g on g.oid = e.grantee group by g.name, e.oid, e.attname, e.kind, e.grantor
  union all
  select 6, format('%s may call %s, which %s', g.name, p.oid::regprocedure, min(r.risk)),
    format('REVOKE EXECUTE ON ROUTINE %s FROM %s', p.oid::regprocedure, g.name)
  from risks r join pg_proc p on p.oid = r.oid
    cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a join grantees g on g.oid = a.grantee
  group by g.name, p.oid
  union all
  select 7, format('%s is mapped to a user of the foreign server %s', g.name, m.srvname),
    format('DROP USER MAPPING FOR %s SERVER %I', g.name, m.srvname)
  from pg_user_mappings m join grantees g on g.oid = m.umuser
  union all
  select 8, 'everybody may read and write every large object',
    format('ALTER DATABASE %I SET lo_compat_privileges = off', current_database())
  where current_setting('lo_compat_privileges')::bool
)
select fact, remedy from findings order by part, fact, remedy
