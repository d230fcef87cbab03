#!lua name=$library
--[[ The queue's state machine inside Redis: protocol_core.py, call by call, as Redis Functions.

Every change of state is one function call, so it happens whole or not at all, whoever dies. Clocks are Redis' own TIME
(a key overrides it for tests). Every function may be called again after its reply was lost: what is done is recognised.
All keys of a partition share a hash tag, so one call touches one slot.

    <p>r:<id>      hash    a request: body, fingerprint, status (w, r, e), epoch, until, n, deliveries, deadline ...
    <p>t:<id>      string  its token log: int32, little endian, four bytes a token; STRLEN is the truth about n
    <p>f:<id>      set     channels of readers beside the one that submitted
    <p>q:<model>   zset    who waits, by rank and arrival
    <p>alarms      zset    when time alone may change a request, by ms
    <p>acct        hash    requests and tokens that wait (w) and run (r), in all and by model
    <p>drain       hash    how fast the queue empties under pressure (drain_rate.py keeps the same three numbers)
    <p>over        hash    how often the first that did not fit was overtaken
    <p>dead        stream  requests given up
    <p>epoch, <p>arrivals, <p>clock

ARGV begins with the limits: lease_ms, max_deliveries, max_queued_tokens, log_ttl_ms, max_overtakes. Replies are
{next alarm in ms or -1, now, ...}. ]]

local RANK = 2 ^ 51 -- arrivals are below it; (rank + 1) * RANK + arrival is exact in a double
local WINDOW_MS = $window_ms
local FIELDS = {'status', 'model', 'tokens', 'prompt', 'score', 'epoch', 'until', 'deliveries', 'deadline', 'cancel',
                'ended_as', 'forget', 'channel', 'fingerprint'}

-- One call: keys, limits, time, and the news it makes.
local function open(keys, args)
    local p = keys[1]
    local c = {p = p, lease_ms = tonumber(args[1]), max_deliveries = tonumber(args[2]), cap = tonumber(args[3]),
               ttl = tonumber(args[4]), overtakes = tonumber(args[5]), news = {}, offered = {}}
    local fixed = redis.call('GET', p .. 'clock')
    if fixed then
        c.now = tonumber(fixed)
    else
        local time = redis.call('TIME')
        c.now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
    end
    return c
end

local function find(c, id)
    local values = redis.call('HMGET', c.p .. 'r:' .. id, unpack(FIELDS))
    if not values[1] then return nil end
    local e = {id = id}
    for i, name in ipairs(FIELDS) do e[name] = values[i] end
    for _, name in ipairs({'tokens', 'prompt', 'score', 'epoch', 'until', 'deliveries', 'deadline', 'forget'}) do
        e[name] = tonumber(e[name] or nil)
    end
    return e
end

local function set(c, e, ...)
    redis.call('HSET', c.p .. 'r:' .. e.id, ...)
end

local function length(c, e) return redis.call('STRLEN', c.p .. 't:' .. e.id) / 4 end

-- ---- counting ----

local function count(c, e, sign)
    for _, key in ipairs({{'r', 1}, {'t', e.tokens}}) do
        local name = e.status .. key[1]
        redis.call('HINCRBY', c.p .. 'acct', name, sign * key[2])
        if redis.call('HINCRBY', c.p .. 'acct', name .. ':' .. e.model, sign * key[2]) == 0 then
            redis.call('HDEL', c.p .. 'acct', name .. ':' .. e.model)
        end
    end
end

local function totals(c)
    local found = redis.call('HMGET', c.p .. 'acct', 'wr', 'wt', 'rr', 'rt')
    return tonumber(found[1] or 0), tonumber(found[2] or 0), tonumber(found[3] or 0), tonumber(found[4] or 0)
end

-- Under pressure: somebody waits, or the queue is half full. Only then do ends say how fast work gets done.
local function note(c, ended)
    local waiting, wt, _, rt = totals(c)
    local drain = redis.call('HMGET', c.p .. 'drain', 'noted', 'pressed', 'ended')
    local elapsed = math.max(0, c.now - tonumber(drain[1] or 0))
    if waiting > 0 or 2 * (wt + rt) >= c.cap then
        local kept = math.exp(-elapsed / WINDOW_MS)
        local pressed = tonumber(drain[2] or 0) * kept + WINDOW_MS * (1 - kept)
        redis.call('HSET', c.p .. 'drain', 'noted', c.now, 'pressed', string.format('%.17g', pressed),
                   'ended', string.format('%.17g', tonumber(drain[3] or 0) * kept + ended))
    else
        redis.call('HSET', c.p .. 'drain', 'noted', c.now)
    end
end

local function move(c, e, status)
    note(c, status == 'e' and e.tokens or 0)
    count(c, e, -1)
    e.status = status
    set(c, e, 'status', status)
    if status ~= 'e' then count(c, e, 1) end
end

-- ---- time ----

local function due(e)
    if e.status == 'e' then return e.forget end
    if e.status == 'w' then return e.deadline end
    if e.deadline and e.deadline < e['until'] then return e.deadline end
    return e['until']
end

-- The earliest alarm stands: one that goes off early finds nothing due and is set again, so renewing costs nothing here.
local function set_alarm(c, e)
    local at = due(e)
    if at then redis.call('ZADD', c.p .. 'alarms', 'LT', at, e.id) end
end

-- ---- changes of one request ----

-- News of one request, for redis.py: how long each part is, then the part; integers little endian, four bytes.
local function framed(id, first, log, terminal)
    return struct.pack('<I4', #id) .. id .. struct.pack('<I4I4', first, #log) .. log .. struct.pack('<I4', #terminal) .. terminal
end

local function tell(c, e, news)
    local channels = redis.call('SMEMBERS', c.p .. 'f:' .. e.id)
    if e.channel and e.channel ~= '' then table.insert(channels, e.channel) end
    for _, channel in ipairs(channels) do
        c.news[channel] = c.news[channel] or {}
        table.insert(c.news[channel], news)
    end
end

local function offer(c, e)
    redis.call('ZADD', c.p .. 'q:' .. e.model, e.score, e.id)
    c.offered[e.model] = true
end

local function unline(c, e)
    redis.call('ZREM', c.p .. 'q:' .. e.model, e.id)
    redis.call('HDEL', c.p .. 'over', e.id)
end

local function finish(c, e, terminal, ended_as)
    if e.status == 'w' then unline(c, e) end
    move(c, e, 'e')
    e.forget = c.now + c.ttl
    set(c, e, 'terminal', terminal, 'forget', e.forget, 'ended_as', ended_as or 'fenced')
    redis.call('HDEL', c.p .. 'r:' .. e.id, 'body')
    tell(c, e, framed(e.id, length(c, e), '', terminal))
    redis.call('DEL', c.p .. 'f:' .. e.id)
    redis.call('ZREM', c.p .. 'alarms', e.id)
    set_alarm(c, e)
end

local function cancelled(c, e, worker_says)
    local usage, timings = {}, nil
    if worker_says then
        local said = cmsgpack.unpack(worker_says)
        usage, timings = said.usage, said.timings
    end
    return cmsgpack.pack({type = 'finished', request_id = e.id, reason = 'cancelled', timings = timings,
                          usage = {prompt_tokens = e.prompt, completion_tokens = length(c, e),
                                   cached_tokens = usage.cached_tokens or 0}})
end

local function failed(e, code, retryable, message)
    return cmsgpack.pack({type = 'failed', request_id = e.id, code = code, message = message, retryable = retryable})
end

local function hold(c, e)
    e['until'] = c.now + c.lease_ms
    set(c, e, 'until', e['until'])
    if e.status == 'w' then
        unline(c, e)
        move(c, e, 'r')
        set_alarm(c, e)
    end
end

local function put_back(c, e)
    move(c, e, 'w')
    offer(c, e)
end

local function lapse(c, e)
    if e.cancel then
        finish(c, e, cancelled(c, e))
    elseif e.deliveries >= c.max_deliveries then
        local message = 'given up: ' .. e.deliveries .. ' workers were lost while serving this'
        redis.call('XADD', c.p .. 'dead', 'MAXLEN', '~', 10000, '*', 'id', e.id, 'model', e.model, 'why', message)
        finish(c, e, failed(e, '$lost_code', $lost_retryable, message))
    else
        put_back(c, e)
    end
end

local function on_alarm(c, e)
    if e.status == 'e' and e.forget <= c.now then
        redis.call('DEL', c.p .. 'r:' .. e.id, c.p .. 't:' .. e.id, c.p .. 'f:' .. e.id)
        return
    end
    if e.status ~= 'e' and e.deadline and e.deadline <= c.now then
        local message = 'the deadline passed after ' .. length(c, e) .. ' tokens'
        finish(c, e, failed(e, '$deadline_code', $deadline_retryable, message), 'expired')
    elseif e.status == 'r' and e['until'] <= c.now then
        lapse(c, e)
    end
    set_alarm(c, e)
end

-- Apply deadlines, lapses and forgetting that are due.
local function expire(c)
    while true do
        local ids = redis.call('ZRANGEBYSCORE', c.p .. 'alarms', '-inf', c.now, 'LIMIT', 0, 200)
        if #ids == 0 then return end
        for _, id in ipairs(ids) do
            redis.call('ZREM', c.p .. 'alarms', id)
            local e = find(c, id)
            if e then on_alarm(c, e) end
        end
    end
end

-- Tell who listens, and answer.
local function close(c, ...)
    for channel, news in pairs(c.news) do redis.call('PUBLISH', channel, table.concat(news)) end
    for model in pairs(c.offered) do redis.call('PUBLISH', c.p .. 'work', model) end
    local first = redis.call('ZRANGE', c.p .. 'alarms', 0, 0, 'WITHSCORES')
    return {first[2] and math.floor(tonumber(first[2])) or -1, c.now, ...}
end

-- ---- the gateways' side ----

-- id, fingerprint, body, model, tokens, prompt tokens, rank, deadline_ms or '', channel -> 'accepted' | 'attached' |
-- 'conflict' | 'full', outstanding, drain pressed, drain ended
local function submit(keys, args)
    local c = open(keys, args)
    expire(c)
    local id, print, body, model = args[6], args[7], args[8], args[9]
    local tokens, prompt, rank = tonumber(args[10]), tonumber(args[11]), tonumber(args[12])
    local known = find(c, id)
    if known then
        return close(c, known.fingerprint == print and 'attached' or 'conflict')
    end
    local _, wt, _, rt = totals(c)
    if wt + rt + tokens > c.cap then
        note(c, 0)
        local drain = redis.call('HMGET', c.p .. 'drain', 'pressed', 'ended')
        return close(c, 'full', wt + rt, drain[1] or '0', drain[2] or '0')
    end
    local arrival = redis.call('INCR', c.p .. 'arrivals')
    local e = {id = id, status = 'w', model = model, tokens = tokens, prompt = prompt, channel = args[14],
               score = (rank + 1) * RANK + arrival, deadline = args[13] ~= '' and c.now + tonumber(args[13]) or nil}
    set(c, e, 'status', 'w', 'model', model, 'tokens', tokens, 'prompt', prompt,
        'score', string.format('%.0f', e.score), 'deliveries', 0, 'fingerprint', print, 'body', body,
        'channel', e.channel)
    if e.deadline then set(c, e, 'deadline', string.format('%.0f', e.deadline)) end
    note(c, 0)
    count(c, e, 1)
    offer(c, e)
    set_alarm(c, e)
    return close(c, 'accepted')
end

-- id -> 'ok' | 'unknown'
local function cancel(keys, args)
    local c = open(keys, args)
    expire(c)
    local e = find(c, args[6])
    if not e then return close(c, 'unknown') end
    if e.status == 'w' then
        finish(c, e, cancelled(c, e))
    elseif e.status == 'r' then
        set(c, e, 'cancel', '1')
    end
    return close(c, 'ok')
end

-- id, start, channel -> 'ok' | 'unknown', tokens from start on as bytes, terminal or ''. The channel hears of what comes.
local function follow(keys, args)
    local c = open(keys, args)
    expire(c)
    local e = find(c, args[6])
    if not e then return close(c, 'unknown') end
    if e.status ~= 'e' and e.channel ~= args[8] then redis.call('SADD', c.p .. 'f:' .. e.id, args[8]) end
    local log = redis.call('GETRANGE', c.p .. 't:' .. e.id, 4 * tonumber(args[7]), -1)
    return close(c, 'ok', log, redis.call('HGET', c.p .. 'r:' .. e.id, 'terminal') or '')
end

-- model or '' -> queued requests, queued tokens, running requests, running tokens
local function depth(keys, args)
    local c = open(keys, args)
    expire(c)
    local suffix = args[6] ~= '' and ':' .. args[6] or ''
    local names = {'wr' .. suffix, 'wt' .. suffix, 'rr' .. suffix, 'rt' .. suffix}
    local found = redis.call('HMGET', c.p .. 'acct', unpack(names))
    for i = 1, 4 do found[i] = tonumber(found[i] or 0) end
    return close(c, unpack(found))
end

-- ---- the workers' side ----

-- The first places of several lines as one: {score, id}, in order.
local function line(c, models, most)
    local places, seen = {}, {}
    for _, model in ipairs(models) do
        if not seen[model] then
            seen[model] = true
            local found = redis.call('ZRANGE', c.p .. 'q:' .. model, 0, most, 'WITHSCORES')
            for i = 1, #found, 2 do table.insert(places, {tonumber(found[i + 1]), found[i]}) end
        end
    end
    table.sort(places, function(a, b) return a[1] < b[1] end)
    return places
end

-- waiting_line.py, pick()
local function pick(c, models, max_requests, max_tokens, capacity)
    local picked, room, head, looked = {}, max_tokens, nil, 0
    for _, place in ipairs(line(c, models, max_requests + c.overtakes + 1)) do
        if #picked >= max_requests then break end
        if head then
            looked = looked + 1
            if looked > c.overtakes or tonumber(redis.call('HGET', c.p .. 'over', head) or 0) >= c.overtakes then break end
        end
        local tokens = tonumber(redis.call('HGET', c.p .. 'r:' .. place[2], 'tokens'))
        local needed = tokens <= capacity and tokens or 0 -- what can never fit is handed out to be refused in words
        if needed <= room then
            room = room - needed
            table.insert(picked, place[2])
            if head then redis.call('HINCRBY', c.p .. 'over', head, 1) end
        elseif not head then
            head = place[2]
        end
    end
    return picked
end

-- max_requests, max_tokens, capacity_tokens, models ... -> {body, epoch, token bytes, delivery} ...
local function lease(keys, args)
    local c = open(keys, args)
    expire(c)
    local models = {}
    for i = 9, #args do table.insert(models, args[i]) end
    local leases = {}
    for _, id in ipairs(pick(c, models, tonumber(args[6]), tonumber(args[7]), tonumber(args[8]))) do
        local e = find(c, id)
        local epoch = redis.call('INCR', c.p .. 'epoch')
        local delivery = redis.call('HINCRBY', c.p .. 'r:' .. id, 'deliveries', 1)
        set(c, e, 'epoch', epoch)
        hold(c, e)
        local log = redis.call('GET', c.p .. 't:' .. id) or ''
        table.insert(leases, {redis.call('HGET', c.p .. 'r:' .. id, 'body'), epoch, log, delivery})
    end
    return close(c, leases)
end

-- A lease's standing: nil and the request, or why it is refused.
local function stands(c, id, epoch)
    local e = find(c, id)
    if not e or e.epoch ~= epoch then return 'fenced', nil end
    return nil, e
end

local function append(c, id, epoch, kind, first, payload)
    local refused, e = stands(c, id, epoch)
    if refused then return refused end
    local n = length(c, e)
    if e.status == 'e' then
        local is_repeat
        if kind == 't' then
            is_repeat = first + #payload / 4 <= n
        else
            is_repeat = e.cancel or redis.call('HGET', c.p .. 'r:' .. id, 'terminal') == payload
        end
        if is_repeat and e.ended_as ~= 'expired' then return nil end
        return e.ended_as
    end
    if kind == 't' then
        if e.cancel then return 'cancelled' end
        hold(c, e)
        local fresh = string.sub(payload, 4 * (n - first) + 1)
        if #fresh > 0 then
            redis.call('APPEND', c.p .. 't:' .. id, fresh)
            tell(c, e, framed(id, n, fresh, ''))
        end
    elseif e.cancel and kind == 'f' then
        finish(c, e, cancelled(c, e, payload))
    else
        finish(c, e, payload)
    end
    return nil
end

-- What only a bug can send: a gap, or a bill that is not what the log holds. Nothing is logged then.
local function bug(c, args)
    local lengths = {}
    for i = 6, #args, 6 do
        local id, epoch, kind, first = args[i], tonumber(args[i + 1]), args[i + 2], tonumber(args[i + 3])
        local refused, e = stands(c, id, epoch)
        if not refused and e.status ~= 'e' and not e.cancel then
            local n = lengths[id] or length(c, e)
            if kind == 't' then
                if first > n then return id, 'tokens from index ' .. first .. ' after ' .. n .. ' logged' end
                lengths[id] = math.max(n, first + #args[i + 4] / 4)
            elseif kind == 'f' and tonumber(args[i + 5]) ~= n then
                return id, 'usage says ' .. args[i + 5] .. ' completion tokens, the log holds ' .. n
            end
        end
    end
    return nil
end

-- {id, epoch, kind (t, f, x), first index, payload, completion tokens} ... -> refusals {id, reason, epoch} ... | 'bug', id, why
local function publish(keys, args)
    local c = open(keys, args)
    expire(c)
    local id, why = bug(c, args)
    if id then return close(c, 'bug', id, why) end
    local refusals = {}
    for i = 6, #args, 6 do
        local epoch = tonumber(args[i + 1])
        local reason = append(c, args[i], epoch, args[i + 2], tonumber(args[i + 3]), args[i + 4])
        if reason then table.insert(refusals, {args[i], reason, epoch}) end
    end
    return close(c, refusals)
end

-- {id, epoch} ... -> refusals
local function renew(keys, args)
    local c = open(keys, args)
    expire(c)
    local refusals = {}
    for i = 6, #args, 2 do
        local id, epoch = args[i], tonumber(args[i + 1])
        local reason, e = stands(c, id, epoch)
        if not reason then
            if e.status == 'e' then reason = e.ended_as
            elseif e.cancel then reason = 'cancelled'
            else hold(c, e) end
        end
        if reason then table.insert(refusals, {id, reason, epoch}) end
    end
    return close(c, refusals)
end

-- {id, epoch} ...: back as if this delivery had not been; tokens stay
local function release(keys, args)
    local c = open(keys, args)
    expire(c)
    for i = 6, #args, 2 do
        local reason, e = stands(c, args[i], tonumber(args[i + 1]))
        if not reason and e.status ~= 'e' then
            redis.call('HDEL', c.p .. 'r:' .. e.id, 'epoch')
            redis.call('HINCRBY', c.p .. 'r:' .. e.id, 'deliveries', -1)
            if e.cancel then finish(c, e, cancelled(c, e))
            elseif e.status == 'r' then put_back(c, e) end
        end
    end
    return close(c)
end

-- Apply what is due: for whoever waits for it.
local function sweep(keys, args)
    local c = open(keys, args)
    expire(c)
    return close(c)
end

redis.register_function('$library_submit', submit)
redis.register_function('$library_cancel', cancel)
redis.register_function('$library_follow', follow)
redis.register_function('$library_depth', depth)
redis.register_function('$library_lease', lease)
redis.register_function('$library_publish', publish)
redis.register_function('$library_renew', renew)
redis.register_function('$library_release', release)
redis.register_function('$library_sweep', sweep)
